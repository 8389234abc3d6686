//! Arithmetic on slices: dense products, sparse attention, and the few element-wise loops that are hot.
//!
//! The only place of this crate with unsafe code: calls of functions compiled for a wider instruction set, the loads
//! and stores of the dense products, and advice on memory. Every function here gives the same bits on every vector width:
//! Rust never reorders a floating-point sum nor contracts a product and a sum, and each sum below has its order written out.

pub(crate) mod packed;
pub(crate) mod pages;
pub(crate) mod peak;
pub(crate) mod shared;
pub(crate) mod sparse;
pub(crate) mod vector;

/// Defines functions compiled three times: for AVX-512, for AVX2, and for what the build targets; the widest
/// that the machine has is called. In their bodies `FUSED` says whether products are fused into sums.
macro_rules! wide {
    ($($(#[$meta:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        $visibility fn $name($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const FUSED: bool>($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $ret)? { body::<true>($($arg),*) }

                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $ret)? { body::<true>($($arg),*) }

                match crate::kernel::width() {
                    // SAFETY: `width` found every feature that `avx512` is compiled for on this machine.
                    #[allow(unsafe_code)]
                    crate::kernel::Width::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: `width` found every feature that `avx2` is compiled for on this machine.
                    #[allow(unsafe_code)]
                    crate::kernel::Width::Avx2 => return unsafe { avx2($($arg),*) },
                    crate::kernel::Width::Baseline => {}
                }
            }
            body::<{ crate::kernel::BASELINE_FUSED }>($($arg),*)
        }
    )*};
}
use wide;

/// Whether the build target itself has fused multiply-adds.
const BASELINE_FUSED: bool = cfg!(target_arch = "aarch64");

/// `a * b + c`, rounded once if `FUSED`, which is fast only where the machine has an instruction for it.
#[inline(always)]
fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Instruction sets that a `wide` function is compiled for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest set of this machine. Detection is cached by the standard library: a load and a test.
#[inline]
fn width() -> Width {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            return if wide { Width::Avx512 } else { Width::Avx2 };
        }
    }
    Width::Baseline
}

/// Names the arithmetic that decides bits on this machine: whether products are fused into sums. Vector width
/// does not matter.
pub(crate) fn numerics_class() -> &'static str {
    if width() != Width::Baseline {
        "x86-64 fused"
    } else if cfg!(target_arch = "x86_64") {
        "x86-64 separate"
    } else {
        std::env::consts::ARCH
    }
}

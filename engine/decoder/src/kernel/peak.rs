//! The most multiply-adds that a core can do: chains in registers, nothing loaded.

use super::{Width, width};

/// Chains side by side: enough to hide the latency of two units.
const CHAINS: usize = 24;

/// `rounds` multiply-adds in each of as many chains as are needed, all lanes wide. Gives how many there were.
pub(crate) fn multiply_adds(rounds: u32) -> u64 {
    let lanes = match width() {
        // SAFETY: `width` found every feature that these are compiled for on this machine.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx512 => unsafe { x86::wide_512(rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx2 => unsafe { x86::wide_256(rounds) },
        Width::Baseline => plain(rounds),
    };
    u64::from(rounds) * CHAINS as u64 * lanes
}

fn plain(rounds: u32) -> u64 {
    const LANES: usize = 4;
    let mut chains = [[1.0_f32; LANES]; CHAINS];
    let factor = std::hint::black_box(0.999_f32);
    for _ in 0..rounds {
        for lane in chains.iter_mut().flatten() {
            *lane = super::fma::<{ super::BASELINE_FUSED }>(*lane, factor, factor);
        }
    }
    std::hint::black_box(chains);
    LANES as u64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps, _mm512_fmadd_ps, _mm512_set1_ps};

    use super::CHAINS;

    #[target_feature(enable = "avx512f")]
    pub(super) fn wide_512(rounds: u32) -> u64 {
        let factor = _mm512_set1_ps(std::hint::black_box(0.999));
        let mut chains = [factor; CHAINS];
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, factor);
            }
        }
        std::hint::black_box(chains);
        16
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn wide_256(rounds: u32) -> u64 {
        let factor = _mm256_set1_ps(std::hint::black_box(0.999));
        // As many as there are registers for; the rest of CHAINS in a second pass.
        for _ in 0..2 {
            let mut chains = [factor; CHAINS / 2];
            for _ in 0..rounds {
                for chain in &mut chains {
                    *chain = _mm256_fmadd_ps(*chain, factor, factor);
                }
            }
            std::hint::black_box(chains);
        }
        8
    }
}

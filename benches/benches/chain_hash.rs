//! Hashing 2^20 tokens into block keys.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use esker_benches::{identity, v4_flash};
use esker_prefix::{Chain, TokenId};

fn chain_hash(criterion: &mut Criterion) {
    let (scope, namespace) = identity(&v4_flash());
    let tokens: Vec<TokenId> = (0..1 << 20).map(TokenId).collect();
    let mut group = criterion.benchmark_group("chain_hash");
    group.throughput(Throughput::Elements(1 << 20));
    group.bench_function("2^20 tokens, blocks of 128", |bencher| {
        bencher.iter(|| Chain::hashes(&scope, namespace, 128, &tokens));
    });
    group.finish();
}

criterion_group!(benches, chain_hash);
criterion_main!(benches);

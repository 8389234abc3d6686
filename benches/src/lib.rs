//! Benchmarks of Esker.

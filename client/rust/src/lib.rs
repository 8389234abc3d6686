//! The Rust client of Esker.

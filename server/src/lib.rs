//! The Esker service: tenants, grants, decoding and the esker command.

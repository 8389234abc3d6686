//! Promises of Esker, seen from outside.

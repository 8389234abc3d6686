//! The wire format of Esker, and every check of what comes from outside.

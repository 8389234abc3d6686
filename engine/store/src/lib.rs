//! The content-addressed store on SSD. Knows no network, tenant, price or model.

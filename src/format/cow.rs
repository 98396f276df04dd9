//! cow images, in all six layouts.

/// True where the first bytes of a file are a cow header.
pub fn probe(_start: &[u8]) -> bool {
    false
}

//! Memory that bytes of files are read to and written from.

use std::ops::{Deref, DerefMut};

/// A page, which also is a multiple of whatever a processor's copying likes.
const ALIGNMENT: usize = 4096;

/// Bytes that start at a page: to and from others the kernel copies at a third of the speed on
/// some processors.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// Makes it at least so long; what was in it may be gone.
    pub(crate) fn reserve(&mut self, length: usize) {
        if self.length < length {
            self.memory = vec![0; length.saturating_add(ALIGNMENT)];
            // Where that can't be told, it is only slower.
            self.start = self.memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            self.length = length;
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_start_at_a_page_also_once_there_are_more_of_them() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        for length in [1, 4096, 100_000, 5000] {
            buffer.reserve(length);
            assert!(buffer.len() >= length);
            assert_eq!(buffer.as_ptr().align_offset(ALIGNMENT), 0);
            buffer.fill(7);
        }
    }
}

//! Decisions out of an input: a byte or two each, 0 when it is used up.

/// Reads an input from one of its ends. What is built is drawn from the front and what is broken from the back, so that a
/// change to one does not change the other.
pub struct Draw<'a> {
    rest: &'a [u8],
    backwards: bool,
}

impl<'a> Draw<'a> {
    pub fn front(input: &'a [u8]) -> Draw<'a> {
        Draw { rest: input, backwards: false }
    }

    pub fn back(input: &'a [u8]) -> Draw<'a> {
        Draw { rest: input, backwards: true }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let taken = if self.backwards { self.rest.split_last() } else { self.rest.split_first() };
        let Some((&byte, rest)) = taken else { return 0 };
        self.rest = rest;
        byte
    }

    /// 0..bound.
    pub fn below(&mut self, bound: usize) -> usize {
        let mut number = usize::from(self.byte());
        let mut most = 0x100;
        while most < bound {
            number = number << 8 | usize::from(self.byte());
            most <<= 8;
        }
        number % bound
    }

    /// One chance in `of`; never once the input is used up.
    pub fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == of - 1
    }

    pub fn u64(&mut self) -> u64 {
        (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// A number at the edge of something, or any.
    pub fn odd_u64(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(256) as u64,
            1 => u64::MAX - self.below(16) as u64,
            2 => u64::from(u32::MAX) - 8 + self.below(16) as u64,
            3 => (1 << 63) - 8 + self.below(16) as u64,
            4 => self.below(1 << 16) as u64 * 4096,
            _ => self.u64(),
        }
    }

    pub fn pick<'b, T>(&mut self, from: &'b [T]) -> Option<&'b T> {
        if from.is_empty() { None } else { Some(&from[self.below(from.len())]) }
    }
}

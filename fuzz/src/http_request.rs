//! The head of an HTTP request: the parser is asked after every read, so what it says of a part must be what it says of the
//! whole, or that there is nothing yet.

use blipmq::gateway::request::parse;

use super::memory;

pub fn run(input: &[u8]) {
    let whole = parse(input);
    if let Ok(Some(request)) = &whole {
        assert!(!request.path.contains('?') && request.path.len() <= input.len());
        assert!(request.accept.len() <= 3 * input.len(), "what is no UTF-8 becomes three bytes each");
    }
    // Every end would be quadratic; beyond the first few, those where lines end and some more.
    for end in (0..input.len()).filter(|end| *end < 64 || end % 61 == 0 || input[end - 1] == b'\n') {
        let part = memory::within(16 * 1024 + 4 * input.len(), || parse(&input[..end]));
        assert!(part == Ok(None) || part == whole, "{end}: {part:?}, whole {whole:?}");
    }
}

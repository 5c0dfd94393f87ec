//! The head of an HTTP request, as far as short answers need it. Pure.

/// Headers of one request.
const HEADERS_MAX: usize = 64;

/// What a handler needs to know of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Without the query.
    pub path: String,
    /// What the client says it understands; empty if it did not say.
    pub accept: String,
    /// HEAD: the answer's head is all that is wanted.
    pub head_only: bool,
}

/// Why there will be no answer to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    #[error("the request's head is too large")]
    TooLarge,
    #[error("bad request: {0}")]
    Bad(httparse::Error),
}

/// Reads what has arrived so far. `None`: not complete yet.
pub fn parse(head: &[u8]) -> Result<Option<Request>, Unfit> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Unfit::TooLarge),
        Err(error) => return Err(Unfit::Bad(error)),
    }
    let target = request.path.unwrap_or_default();
    let accept = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case("accept"));
    Ok(Some(Request {
        path: target.split('?').next().unwrap_or_default().to_string(),
        accept: accept.map_or_else(String::new, |header| String::from_utf8_lossy(header.value).into_owned()),
        head_only: request.method == Some("HEAD"),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(head: &str) -> Option<Request> {
        parse(head.as_bytes()).expect("a good request")
    }

    #[test]
    fn the_query_is_not_part_of_the_path() {
        let request = parsed("HEAD /metrics?x=/y HTTP/1.1\r\naCCept: text/plain\r\n\r\n").expect("whole");
        let expected = Request { path: "/metrics".into(), accept: "text/plain".into(), head_only: true };
        assert_eq!(request, expected);
        let request = parsed("GET / HTTP/1.0\r\n\r\n").expect("whole");
        assert_eq!(request, Request { path: "/".into(), accept: String::new(), head_only: false });
    }

    #[test]
    fn what_is_no_request_is_refused() {
        assert!(matches!(parse(b"\x16\x03\x01"), Err(Unfit::Bad(_))));
        assert!(matches!(parse(b"GET / HTTP/3\r\n\r\n"), Err(Unfit::Bad(_))));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(parse(many.as_bytes()), Err(Unfit::TooLarge));
    }

    proptest! {
        /// It is asked after every read: what it says of a part must be what it says of the whole, or nothing yet.
        #[test]
        fn the_slicing_makes_no_difference(
            method in "(GET|HEAD|POST|G T)",
            target in "[/a-z?%é]{0,12}",
            headers in proptest::collection::vec("[A-Za-z-]{0,8}: ?[ -~]{0,10}", 0..5),
            ending in "(\r\n|\n|\r|)",
        ) {
            let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
            let head = format!("{method} {target} HTTP/1.1\r\n{lines}{ending}");
            let whole = parse(head.as_bytes());
            for end in 0..head.len() {
                let part = parse(&head.as_bytes()[..end]);
                prop_assert!(part == Ok(None) || part == whole, "{end}: {part:?}, whole {whole:?}");
            }
        }
    }
}

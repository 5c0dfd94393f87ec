//! What may go wrong for a client, as numbers and texts. v1's are byte-exact, since clients compare them.

use bytes::Bytes;

use crate::protocol::reply::Reply;
use crate::protocol::request::{Malformed, RequestKind};

/// The request is malformed or its values are not allowed.
pub const INVALID: u16 = 400;
/// Not logged in, or the key is wrong.
pub const UNAUTHENTICATED: u16 = 401;
/// This key may not do this.
pub const FORBIDDEN: u16 = 403;
/// No such subscription, delivery tag or alias.
pub const UNKNOWN: u16 = 404;
/// The request does not fit what is already there.
pub const CONFLICT: u16 = 409;
/// The message, its options or the list of ranges is too large.
pub const TOO_LARGE: u16 = 413;
/// The protocol version is not spoken here.
pub const VERSION: u16 = 426;
/// A limit is reached; it may work later.
pub const LIMIT: u16 = 429;
/// The broker could not do it; nothing is known to be stored.
pub const INTERNAL: u16 = 500;
/// The broker is shutting down.
pub const SHUTTING_DOWN: u16 = 503;
/// The disk is full or a quota is used up.
pub const STORAGE_FULL: u16 = 507;

/// A code and the text that always goes with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    pub code: u16,
    pub text: &'static str,
}

impl Fault {
    const fn new(code: u16, text: &'static str) -> Fault {
        Fault { code, text }
    }

    /// As an answer: NACK in v1, ERROR in v2.
    pub fn error(self, cid: u64) -> Reply {
        Reply::Error { cid, code: self.code, text: Bytes::from_static(self.text.as_bytes()) }
    }

    /// As what the decoder found.
    pub(crate) fn malformed(self, frame_type: u8) -> RequestKind {
        RequestKind::Malformed(Malformed { code: self.code, text: self.text, frame_type })
    }
}

// Texts of v1 (V1.md 2.5), in the order a connection may meet them.
pub const INVALID_HELLO: Fault = Fault::new(INVALID, "invalid HELLO payload");
pub const UNSUPPORTED_VERSION: Fault = Fault::new(VERSION, "unsupported protocol version");
pub const HELLO_ALREADY: Fault = Fault::new(INVALID, "HELLO already performed");
pub const HELLO_MISSING: Fault = Fault::new(INVALID, "HELLO not performed");
pub const INVALID_AUTH: Fault = Fault::new(INVALID, "invalid AUTH payload");
pub const INVALID_KEY: Fault = Fault::new(UNAUTHENTICATED, "invalid API key");
/// v1. In v2 a second AUTH is a `CONFLICT` with the same text.
pub const AUTH_ALREADY: Fault = Fault::new(INVALID, "already authenticated");
pub const AUTH_ALREADY_V2: Fault = Fault::new(CONFLICT, "already authenticated");
pub const AUTH_MISSING: Fault = Fault::new(UNAUTHENTICATED, "unauthenticated");
pub const INVALID_PUBLISH: Fault = Fault::new(INVALID, "invalid PUBLISH payload");
pub const INVALID_SUBSCRIBE: Fault = Fault::new(INVALID, "invalid SUBSCRIBE payload");
pub const INVALID_ACK: Fault = Fault::new(INVALID, "invalid ACK payload");
pub const INVALID_POLL: Fault = Fault::new(INVALID, "invalid POLL payload");
pub const EMPTY_TOPIC: Fault = Fault::new(INVALID, "empty topic");
pub const INVALID_QOS: Fault = Fault::new(INVALID, "invalid QoS value");
pub const ZERO_SUBSCRIPTION: Fault = Fault::new(INVALID, "subscription_id must be non-zero");
pub const UNKNOWN_DELIVERY: Fault = Fault::new(UNKNOWN, "unknown subscription or delivery tag");
/// v1 and v2: code `INTERNAL`; the reason follows.
pub const DURABLE_PUBLISH_FAILED: &str = "durable publish failed: ";

// Texts of v2's own frames.
pub const INVALID_REJECT: Fault = Fault::new(INVALID, "invalid REJECT payload");
pub const INVALID_CREDIT: Fault = Fault::new(INVALID, "invalid CREDIT payload");
pub const INVALID_UNSUBSCRIBE: Fault = Fault::new(INVALID, "invalid UNSUBSCRIBE payload");
pub const INVALID_ALIAS: Fault = Fault::new(INVALID, "invalid ALIAS payload");
pub const INVALID_OPTION: Fault = Fault::new(INVALID, "invalid option value");
pub const REPEATED_OPTION: Fault = Fault::new(INVALID, "option given twice");
pub const TWO_IDENTITIES: Fault = Fault::new(INVALID, "message id and publisher sequence exclude each other");
pub const INVALID_PRIORITY: Fault = Fault::new(INVALID, "priority must be 0 to 9");
pub const INVALID_CREDIT_VALUE: Fault = Fault::new(INVALID, "credit must be 1 to 65535");
pub const INVALID_TAG_RANGE: Fault = Fault::new(INVALID, "invalid range of delivery tags");
pub const OPTIONS_TOO_LONG: Fault = Fault::new(TOO_LARGE, "options too long");
pub const TOO_MANY_RANGES: Fault = Fault::new(TOO_LARGE, "too many ranges of delivery tags");

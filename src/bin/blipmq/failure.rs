//! How the tool fails: one sentence that says what to do, and a code for scripts.

use std::io;
use std::process::ExitCode;

use blipmq::client;

use crate::wal;

/// Why a subcommand could not do what it was asked to.
#[derive(Debug)]
pub struct Failure {
    message: String,
    code: u8,
}

/// Whatever has no code of its own.
const FAILED: u8 = 1;

impl Failure {
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), code: FAILED }
    }

    pub fn with_code(message: impl Into<String>, code: i32) -> Failure {
        Failure { message: message.into(), code: u8::try_from(code).unwrap_or(FAILED) }
    }

    /// Says it on standard error and gives the process's exit code.
    pub fn report(self, json: bool) -> ExitCode {
        if json {
            eprintln!("{}", serde_json::json!({ "error": self.message }));
        } else {
            eprintln!("blipmq: {}", self.message);
        }
        ExitCode::from(self.code)
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Failure {
        Failure::new(error.to_string())
    }
}

impl From<wal::Failed> for Failure {
    fn from(failed: wal::Failed) -> Failure {
        Failure { message: failed.message, code: failed.code }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::new(error.to_string())
    }
}

/// Writes to standard output. A reader that has seen enough (`| head`) is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    use io::Write;
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

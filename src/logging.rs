//! Log lines: to standard output, one line each, `key=value` after the sentence, filtered by `RUST_LOG`.
//!
//! Owns: the format and the filter. Never: decides what is worth a line.

use std::io::IsTerminal;
use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

/// Without `RUST_LOG`.
const DEFAULT_FILTER: &str = "info";

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error(
        "environment variable RUST_LOG: {0}; expected a level (error, warn, info, debug, trace) or a list such as \"info,blipmq::net=debug\""
    )]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("environment variable RUST_LOG: the value is not UTF-8")]
    NotText,
    #[error("logging is already set up: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets logging up for the whole process, once, before any core starts. The runtime's `log` lines (it reports its
/// degradations only there) arrive in the same place.
pub fn init() -> Result<(), LoggingError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) => Some(text),
        Err(std::env::VarError::NotPresent) => None,
        Err(std::env::VarError::NotUnicode(_)) => return Err(LoggingError::NotText),
    };
    subscriber(filter.as_deref(), std::io::stdout, std::io::stdout().is_terminal())?.try_init()?;
    Ok(())
}

fn subscriber<W>(filter: Option<&str>, writer: W, colours: bool) -> Result<impl Subscriber, LoggingError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = match filter.map(str::trim) {
        None | Some("") => EnvFilter::new(DEFAULT_FILTER),
        Some(text) => EnvFilter::try_new(text)?,
    };
    Ok(tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(writer).finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(filter: Option<&str>) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = subscriber(filter, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(core = 1, "net listening on 127.0.0.1:5555");
            tracing::debug!("details");
        });
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn info_is_the_default_and_lines_keep_their_words() {
        for filter in [None, Some(" ")] {
            let text = written(filter);
            assert!(text.contains("INFO") && text.contains("net listening on 127.0.0.1:5555 core=1\n"), "{text}");
            assert_eq!(text.lines().count(), 1);
        }
    }

    #[test]
    fn rust_log_filters() {
        assert_eq!(written(Some("warn")), "");
        assert_eq!(written(Some("warn,blipmq=debug")).lines().count(), 2);
        let Err(error) = subscriber(Some("blipmq=loud"), io::sink, false) else { panic!("accepted") };
        assert!(error.to_string().contains("RUST_LOG"), "{error}");
    }
}

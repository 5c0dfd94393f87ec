//! Memory at rest, and what one logged-in connection that does nothing adds to it (kernel socket buffers not included).

use super::{Bench, Scenario};
use crate::Result;
use crate::broker::Broker;
use crate::report::Values;
use crate::wire::Link;

/// Below the usual limit of 1024 open files, for the bench and for the broker.
const CONNECTIONS: usize = 800;

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("idle", run)]
}

fn run(bench: &Bench) -> Result<Values> {
    let broker = Broker::start(&bench.setup)?;
    let at_rest = broker.rss_mib()?;
    let links: Vec<(Link, u16)> = (0..CONNECTIONS).map(|_| Link::login(broker.port)).collect::<Result<_>>()?;
    let grown = broker.rss_mib()? - at_rest;
    Ok(Values::from([
        ("start_ms".to_string(), broker.start_time.as_secs_f64() * 1e3),
        ("rss_mib".to_string(), at_rest),
        ("kib_per_connection".to_string(), grown * 1024.0 / links.len() as f64),
    ]))
}

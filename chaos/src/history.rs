//! A history on disk, one line per event, and the recorder that many clients share.
//!
//! The order of lines is the order in which the clients saw things: an invoke is recorded before its bytes leave, all
//! else after its bytes have come. `chaos judge FILE` reads a kept history and judges it again.
//!
//! P topic                publisher 0, 1, …            C publisher seq 0|1      confirmed, as duplicate
//! Q topic 0|1            subscription 0, 1, … shared  R publisher seq code     rejected
//! A 0|1                  strict                       U publisher seq          unknown
//! B run                  boot                         K sub publisher seq      consumer's ack confirmed
//! I publisher seq        invoke                       S run                    stuck
//! T sub publisher seq    consumer's ack sent         M run text             misbehaved
//! D sub conn tag attempt 0|1 [publisher topic seq]       delivery, redelivered, nothing if the payload is nonsense
//! @ writes micros        what follows was recorded when the disk had been given so many writes, at this time
//!   … @ p0 p1 d0 d1                                      published and decided between these
//!
//! J topic                publisher joins              N topic 0|1 0|1 0|1      subscription asked for: acks, named, earliest
//! Z publisher seq        found among the dead letters H sub conn 0|1|-         attached, resumed
//! L publisher seq log at place in the log             E what …                 excused
//! X publisher seq 0|1 class|- ttl delay sent          special message: at most once, …

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::str::{FromStr, SplitAsciiWhitespace};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cut::{Stamp, Stamped};
use crate::message::MessageId;
use crate::oracle::{Delivery, Event, Excuse, Oracle, Plan, PlannedSubscription, SubKind, Timing, Traits, Verdict};

/// Appends to the history file and shows each event to the oracle. Shared by all clients.
pub struct Recorder(Mutex<Inner>);

struct Inner {
    oracle: Oracle,
    file: BufWriter<File>,
    failed: Option<io::Error>,
    stamps: Option<Stamps>,
}

/// For a history that a power cut may end anywhere: when each event was recorded.
struct Stamps {
    clock: Box<dyn Fn() -> io::Result<Stamp> + Send>,
    kept: Vec<Stamped>,
}

impl Recorder {
    pub fn create(path: &Path, plan: Plan) -> io::Result<Recorder> {
        let mut file = BufWriter::new(File::create(path)?);
        write_plan(&mut file, &plan)?;
        Ok(Recorder(Mutex::new(Inner { oracle: Oracle::new(plan), file, failed: None, stamps: None })))
    }

    /// One that keeps its events too, each with what `clock` says when it is recorded: for an invoke and an acknowledgement
    /// that is before its bytes leave, for all else after they have come.
    pub fn stamped(
        path: &Path,
        plan: Plan,
        clock: impl Fn() -> io::Result<Stamp> + Send + 'static,
    ) -> io::Result<Recorder> {
        let mut recorder = Recorder::create(path, plan)?;
        let inner = recorder.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        inner.stamps = Some(Stamps { clock: Box::new(clock), kept: Vec::new() });
        Ok(recorder)
    }

    pub fn record(&self, events: &[Event]) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let Some(stamps) = &mut inner.stamps {
            let written = (stamps.clock)().and_then(|stamp| {
                stamps.kept.extend(events.iter().map(|event| Stamped { stamp, event: event.clone() }));
                writeln!(inner.file, "@ {} {}", stamp.writes, stamp.micros)
            });
            inner.failed = inner.failed.take().or(written.err());
        }
        for event in events {
            inner.oracle.observe(event);
            if let Err(error) = write_event(&mut inner.file, event) {
                inner.failed.get_or_insert(error);
            }
        }
    }

    /// What was found so far, and how many deliveries are still missing.
    pub fn so_far(&self) -> (Verdict, u64) {
        let inner = self.lock();
        (inner.oracle.so_far().clone(), inner.oracle.missing())
    }

    /// The events with their stamps, and what was found while they were recorded. `Err`: they are not complete.
    pub fn into_stamped(self) -> io::Result<(Vec<Stamped>, Verdict)> {
        let mut inner = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        inner.file.flush()?;
        let kept = inner.stamps.map(|stamps| stamps.kept).unwrap_or_default();
        inner.failed.map_or(Ok((kept, inner.oracle.finish(false))), Err)
    }

    /// `Err`: the history on disk is not complete.
    pub fn finish(self, drained: bool) -> io::Result<Verdict> {
        let mut inner = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        inner.file.flush()?;
        inner.failed.map_or(Ok(inner.oracle.finish(drained)), Err)
    }

    /// A client that panicked fails the run by itself; what it recorded is whole.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a history in which everybody joins as it goes.
pub fn write(path: &Path, plan: &Plan, events: &[Event]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    write_plan(&mut file, plan)?;
    events.iter().try_for_each(|event| write_event(&mut file, event))?;
    file.flush()
}

/// Judges a history that was kept.
pub fn judge(path: &Path, drained: bool) -> io::Result<Verdict> {
    let mut plan = Plan::default();
    let mut oracle: Option<Oracle> = None;
    for (number, line) in BufReader::new(File::open(path)?).lines().enumerate() {
        let line = line?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("{}:{}: {line}", path.display(), number + 1));
        match line.as_bytes().first() {
            Some(b'P' | b'Q' | b'A') if oracle.is_none() => read_plan(&line, &mut plan).ok_or_else(bad)?,
            Some(b'@') => {}
            _ => {
                let event = read_event(&line).ok_or_else(bad)?;
                oracle.get_or_insert_with(|| Oracle::new(plan.clone())).observe(&event);
            }
        }
    }
    Ok(oracle.unwrap_or_else(|| Oracle::new(plan)).finish(drained))
}

/// Keeps a history that was made up of others, so that it can be judged again.
pub fn write(path: &Path, plan: &Plan, events: &[Event]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    write_plan(&mut file, plan)?;
    events.iter().try_for_each(|event| write_event(&mut file, event))?;
    file.flush()
}

fn write_plan(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    writeln!(out, "A {}", u8::from(plan.strict))?;
    for topic in &plan.publishers {
        writeln!(out, "P {topic}")?;
    }
    plan.subscriptions.iter().try_for_each(|sub| writeln!(out, "Q {} {}", sub.topic, u8::from(sub.shared)))
}

fn read_plan(line: &str, plan: &mut Plan) -> Option<()> {
    let mut words = line.split_ascii_whitespace();
    match words.next()? {
        "P" => plan.publishers.push(number(&mut words)?),
        "Q" => {
            let (topic, shared) = (number(&mut words)?, number::<u8>(&mut words)? != 0);
            plan.subscriptions.push(PlannedSubscription { topic, shared });
        }
        _ => plan.strict = number::<u8>(&mut words)? != 0,
    }
    Some(())
}

fn write_event(out: &mut impl Write, event: &Event) -> io::Result<()> {
    match event {
        Event::Boot { run } => writeln!(out, "B {run}"),
        Event::Invoke { publisher, seq } => writeln!(out, "I {publisher} {seq}"),
        Event::Confirmed { publisher, seq, duplicate } => writeln!(out, "C {publisher} {seq} {}", u8::from(*duplicate)),
        Event::Rejected { publisher, seq, code } => writeln!(out, "R {publisher} {seq} {code}"),
        Event::Unknown { publisher, seq } => writeln!(out, "U {publisher} {seq}"),
        Event::AckSent { sub, publisher, seq } => writeln!(out, "T {sub} {publisher} {seq}"),
        Event::Acked { sub, publisher, seq } => writeln!(out, "K {sub} {publisher} {seq}"),
        Event::Stuck { run } => writeln!(out, "S {run}"),
        Event::Misbehaved { run, text } => writeln!(out, "M {run} {}", text.replace('\n', " | ")),
        Event::Deliver(Delivery { sub, conn, tag, attempt, redelivered, message, timing }) => {
            write!(out, "D {sub} {conn} {tag} {attempt} {}", u8::from(*redelivered))?;
            if let Some(MessageId { publisher, topic, seq }) = message {
                write!(out, " {publisher} {topic} {seq}")?;
            }
            if let Some(Timing { published: (p0, p1), decided: (d0, d1) }) = timing {
                write!(out, " @ {p0} {p1} {d0} {d1}")?;
            }
            writeln!(out)
        }
        Event::Joins { topic } => writeln!(out, "J {topic}"),
        Event::Asks { topic, kind: SubKind { acks, named, earliest } } => {
            writeln!(out, "N {topic} {} {} {}", u8::from(*acks), u8::from(*named), u8::from(*earliest))
        }
        Event::Attached { sub, conn, resumed } => {
            writeln!(out, "H {sub} {conn} {}", resumed.map_or("-", |resumed| if resumed { "1" } else { "0" }))
        }
        Event::Buried { publisher, seq } => writeln!(out, "Z {publisher} {seq}"),
        Event::Position { publisher, seq, log, at } => writeln!(out, "L {publisher} {seq} {log} {at}"),
        Event::Special { publisher, seq, traits: Traits { at_most_once, class, ttl_ms, delay_ms, sent_ms } } => {
            let class = class.map_or("-".to_string(), |class| class.to_string());
            writeln!(out, "X {publisher} {seq} {} {class} {ttl_ms} {delay_ms} {sent_ms}", u8::from(*at_most_once))
        }
        Event::Excused(excuse) => match excuse {
            Excuse::Shared { sub } => writeln!(out, "E shared {sub}"),
            Excuse::Ends { sub } => writeln!(out, "E ends {sub}"),
            Excuse::Unsure { sub } => writeln!(out, "E unsure {sub}"),
            Excuse::GivesUp { sub } => writeln!(out, "E gives-up {sub}"),
            Excuse::MayBeLost { publisher, seq } => writeln!(out, "E lost {publisher} {seq}"),
            Excuse::AckMayBeLost { sub, publisher, seq } => writeln!(out, "E ack-lost {sub} {publisher} {seq}"),
        },
    }
}

fn read_event(line: &str) -> Option<Event> {
    let mut words = line.split_ascii_whitespace();
    let w = &mut words;
    let event = match w.next()? {
        "B" => Event::Boot { run: number(w)? },
        "I" => Event::Invoke { publisher: number(w)?, seq: number(w)? },
        "C" => Event::Confirmed { publisher: number(w)?, seq: number(w)?, duplicate: number::<u8>(w)? != 0 },
        "R" => Event::Rejected { publisher: number(w)?, seq: number(w)?, code: number(w)? },
        "U" => Event::Unknown { publisher: number(w)?, seq: number(w)? },
        "T" => Event::AckSent { sub: number(w)?, publisher: number(w)?, seq: number(w)? },
        "K" => Event::Acked { sub: number(w)?, publisher: number(w)?, seq: number(w)? },
        "S" => Event::Stuck { run: number(w)? },
        "M" => Event::Misbehaved { run: number(w)?, text: w.collect::<Vec<_>>().join(" ") },
        "D" => {
            let (sub, conn, tag, attempt) = (number(w)?, number(w)?, number(w)?, number(w)?);
            let redelivered = flag(w)?;
            let mut next = w.next();
            let mut message = None;
            if let Some(publisher) = next.filter(|word| *word != "@") {
                message = Some(MessageId { publisher: publisher.parse().ok()?, topic: number(w)?, seq: number(w)? });
                next = w.next();
            }
            let timing = match next {
                None => None,
                Some("@") => Some(Timing { published: (number(w)?, number(w)?), decided: (number(w)?, number(w)?) }),
                Some(_) => return None,
            };
            Event::Deliver(Delivery { sub, conn, tag, attempt, redelivered, message, timing })
        }
        "J" => Event::Joins { topic: number(w)? },
        "N" => {
            let topic = number(w)?;
            Event::Asks { topic, kind: SubKind { acks: flag(w)?, named: flag(w)?, earliest: flag(w)? } }
        }
        "H" => Event::Attached { sub: number(w)?, conn: number(w)?, resumed: optional(w)?.map(|flag| flag != 0) },
        "Z" => Event::Buried { publisher: number(w)?, seq: number(w)? },
        "L" => Event::Position { publisher: number(w)?, seq: number(w)?, log: number(w)?, at: number(w)? },
        "X" => {
            let (publisher, seq, at_most_once) = (number(w)?, number(w)?, flag(w)?);
            let class = optional(w)?;
            let (ttl_ms, delay_ms, sent_ms) = (number(w)?, number(w)?, number(w)?);
            Event::Special { publisher, seq, traits: Traits { at_most_once, class, ttl_ms, delay_ms, sent_ms } }
        }
        "E" => Event::Excused(match w.next()? {
            "shared" => Excuse::Shared { sub: number(w)? },
            "ends" => Excuse::Ends { sub: number(w)? },
            "unsure" => Excuse::Unsure { sub: number(w)? },
            "gives-up" => Excuse::GivesUp { sub: number(w)? },
            "lost" => Excuse::MayBeLost { publisher: number(w)?, seq: number(w)? },
            "ack-lost" => Excuse::AckMayBeLost { sub: number(w)?, publisher: number(w)?, seq: number(w)? },
            _ => return None,
        }),
        _ => return None,
    };
    words.next().is_none().then_some(event)
}

fn flag(words: &mut SplitAsciiWhitespace<'_>) -> Option<bool> {
    number::<u8>(words).map(|flag| flag != 0)
}

/// A small number or `-`; the outer `None`: neither.
fn optional(words: &mut SplitAsciiWhitespace<'_>) -> Option<Option<u8>> {
    match words.next()? {
        "-" => Some(None),
        word => word.parse().ok().map(Some),
    }
}

fn number<T: FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Option<T> {
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Kind;

    #[test]
    fn a_kept_history_gets_the_same_verdict() -> io::Result<()> {
        let shared = PlannedSubscription { topic: 4, shared: true };
        let plan = Plan { publishers: vec![4], subscriptions: vec![shared], strict: true };
        let message = Some(MessageId { publisher: 0, topic: 4, seq: 1 });
        let first = Delivery { sub: 0, conn: 3, tag: 9, attempt: 1, redelivered: false, message, timing: None };
        let events = [
            Event::Boot { run: 1 },
            Event::Invoke { publisher: 0, seq: 1 },
            Event::Unknown { publisher: 0, seq: 1 },
            Event::Invoke { publisher: 0, seq: 1 },
            Event::Confirmed { publisher: 0, seq: 1, duplicate: true },
            Event::Deliver(first),
            Event::AckSent { sub: 0, publisher: 0, seq: 1 },
            Event::Acked { sub: 0, publisher: 0, seq: 1 },
            Event::Deliver(Delivery { attempt: 2, redelivered: true, ..first }),
            Event::Deliver(Delivery { message: None, ..first }),
            Event::Invoke { publisher: 0, seq: 2 },
            Event::Rejected { publisher: 0, seq: 2, code: 507 },
            Event::Invoke { publisher: 0, seq: 3 },
            Event::Confirmed { publisher: 0, seq: 3, duplicate: false },
            Event::Stuck { run: 1 },
            Event::Misbehaved { run: 1, text: "exit status: 70".into() },
        ];
        let timing = Some(Timing { published: (1, 2), decided: (3, 4) });
        let joined = [
            Event::Joins { topic: 3 },
            Event::Asks { topic: 3, kind: SubKind { acks: true, named: false, earliest: true } },
            Event::Attached { sub: 1, conn: 2, resumed: None },
            Event::Attached { sub: 1, conn: 2, resumed: Some(true) },
            Event::Special { publisher: 1, seq: 1, traits: Traits::ORDINARY },
            Event::Special { publisher: 1, seq: 1, traits: Traits { class: None, ..Traits::ORDINARY } },
            Event::Position { publisher: 1, seq: 1, log: 2, at: 4096 },
            Event::Buried { publisher: 1, seq: 1 },
            Event::Excused(Excuse::Shared { sub: 1 }),
            Event::Excused(Excuse::Ends { sub: 1 }),
            Event::Excused(Excuse::Unsure { sub: 1 }),
            Event::Excused(Excuse::GivesUp { sub: 1 }),
            Event::Excused(Excuse::MayBeLost { publisher: 1, seq: 1 }),
            Event::Excused(Excuse::AckMayBeLost { sub: 1, publisher: 1, seq: 1 }),
            Event::Deliver(Delivery { timing, ..first }),
            Event::Deliver(Delivery { timing, message: None, ..first }),
        ];
        for event in events.iter().chain(&joined) {
            let mut line = Vec::new();
            write_event(&mut line, event)?;
            assert_eq!(read_event(&String::from_utf8_lossy(&line)).as_ref(), Some(event));
        }
        let path = std::env::temp_dir().join(format!("chaos-history-{}", std::process::id()));
        let recorder = Recorder::create(&path, plan)?;
        recorder.record(&events);
        let verdict = recorder.finish(true)?;
        let again = judge(&path, true);
        std::fs::remove_file(&path)?;
        assert_eq!(again?, verdict);
        for kind in [Kind::Lost, Kind::Phantom, Kind::Duplicate, Kind::Stuck, Kind::Misbehaved] {
            assert_eq!(verdict.count(kind), 1, "{}", kind.name());
        }
        Ok(())
    }

    #[test]
    fn a_line_that_is_no_event_is_refused() {
        for line in ["", "X 1", "I 1", "I 1 2 3", "C 0 1", "D 0 1 2 1 0 5", "B -1"] {
            assert_eq!(read_event(line), None, "{line}");
        }
    }
}

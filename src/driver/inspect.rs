//! Questions to the cores from outside: an ordinary thread asks, each core answers in one of its turns.
//!
//! Owns: the channels and the waiting. Never: makes a core wait; a core that is stuck is one that did not answer.

use std::time::{Duration, Instant};

use flume::{Receiver, Sender};

use crate::limits;
use crate::metrics::CoreMetrics;
pub use crate::shard::inspect::{SubInfo, SubInfoKind, TopicInfo};
use crate::types::CoreId;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question {
    Metrics,
    /// The core's first `limits::INSPECT_ROWS_MAX` topics.
    Topics,
    /// The core's first `limits::INSPECT_ROWS_MAX` subscriptions.
    Subs,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    Metrics(Box<CoreMetrics>),
    Topics(Vec<TopicInfo>),
    Subs(Vec<SubInfo>),
}

/// Somebody who can be asked about every core.
pub trait Inspect: Send + Sync {
    /// Asks all cores at once; one entry per core, in their order, `None` for those that did not answer `within`
    /// that time.
    fn ask(&self, what: Question, within: Duration) -> Vec<(CoreId, Option<Answer>)>;
}

/// A question as it reaches a core.
#[derive(Debug)]
pub struct Inquiry {
    pub question: Question,
    core: CoreId,
    reply: Sender<(CoreId, Answer)>,
}

impl Inquiry {
    /// Never waits: the asker made room for one answer of each core. If it has given up, the answer is dropped.
    pub fn answer(self, answer: Answer) {
        drop(self.reply.try_send((self.core, answer)));
    }
}

/// Asks running cores through one channel each.
pub struct Inquirer {
    cores: Vec<Sender<Inquiry>>,
}

impl Inquirer {
    /// The asking side, and one receiver for each core.
    pub fn new(cores: u16) -> (Inquirer, Vec<Receiver<Inquiry>>) {
        let (senders, receivers) = (0..cores).map(|_| flume::bounded(limits::INQUIRIES_MAX)).unzip();
        (Inquirer { cores: senders }, receivers)
    }
}

impl Inspect for Inquirer {
    fn ask(&self, what: Question, within: Duration) -> Vec<(CoreId, Option<Answer>)> {
        let deadline = Instant::now() + within;
        let (reply, replies) = flume::bounded(self.cores.len().max(1));
        let mut answers = Vec::with_capacity(self.cores.len());
        for (core, sender) in (0..).map(CoreId).zip(&self.cores) {
            // Full or closed: the core does not take questions any more, and will be reported as silent.
            drop(sender.try_send(Inquiry { question: what, core, reply: reply.clone() }));
            answers.push((core, None));
        }
        // Ours out of the way: when all that were asked have answered or are gone, the channel ends.
        drop(reply);
        while let Ok((core, answer)) = replies.recv_deadline(deadline) {
            answers[usize::from(core.0)].1 = Some(answer);
        }
        answers
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Long enough that no test ends by it.
    const LONG: Duration = Duration::from_secs(60);

    fn topics(core: u16) -> Answer {
        let metrics = CoreMetrics { topics: u64::from(core) + 10, ..CoreMetrics::default() };
        Answer::Metrics(Box::new(metrics))
    }

    #[test]
    fn all_cores_answer_and_nobody_waits_longer() {
        let (inquirer, receivers) = Inquirer::new(3);
        let cores: Vec<_> = (0..)
            .zip(receivers)
            .map(|(core, receiver)| {
                thread::spawn(move || {
                    let inquiry = receiver.recv().unwrap();
                    assert_eq!(inquiry.question, Question::Metrics);
                    inquiry.answer(topics(core));
                    receiver
                })
            })
            .collect();
        let answers = inquirer.ask(Question::Metrics, LONG);
        let expected: Vec<_> = (0..3).map(|core| (CoreId(core), Some(topics(core)))).collect();
        assert_eq!(answers, expected);
        cores.into_iter().for_each(|core| drop(core.join().unwrap()));
    }

    #[test]
    fn a_silent_core_is_named_and_does_not_fill_up() {
        let (inquirer, receivers) = Inquirer::new(2);
        for _ in 0..limits::INQUIRIES_MAX + 3 {
            let answers = inquirer.ask(Question::Topics, Duration::ZERO);
            assert_eq!(answers, [(CoreId(0), None), (CoreId(1), None)]);
        }
        assert_eq!(receivers[1].len(), limits::INQUIRIES_MAX);
        // Late answers go nowhere and block nobody.
        receivers[1].drain().for_each(|inquiry| inquiry.answer(Answer::Topics(Vec::new())));
    }

    #[test]
    fn a_core_that_ended_is_not_waited_for() {
        let (inquirer, mut receivers) = Inquirer::new(2);
        drop(receivers.pop());
        let first = receivers.pop().unwrap();
        let core = thread::spawn(move || first.recv().unwrap().answer(Answer::Subs(Vec::new())));
        let answers = inquirer.ask(Question::Subs, LONG);
        assert_eq!(answers, [(CoreId(0), Some(Answer::Subs(Vec::new()))), (CoreId(1), None)]);
        core.join().unwrap();
    }
}

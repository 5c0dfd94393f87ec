//! `blipmq req`: ask on a topic, wait for the answer on one of our own.

use std::time::Duration;

use blipmq::client::{Delivery, Error, Qos};

use crate::Global;
use crate::connect::connect;
use crate::failure::{Failure, print};
use crate::{subscribe, values};

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq req weather 'in Bergen?'                 wait up to 5 s for the answer and print it
  blipmq req weather 'in Bergen?' --timeout 1m    be patient
  blipmq req weather 'in Bergen?' --json          the answer with its headers, for a program

Whoever answers publishes to the topic that the request's `reply_to` names, as `blipmq sub weather --json` shows it.
Exit code 1 means that no answer came in time.")]
pub struct Args {
    topic: String,
    message: String,
    /// How long to wait for the answer.
    #[arg(long, default_value = "5s", value_parser = values::duration)]
    timeout: Duration,
    /// key=value, delivered with the request; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::header)]
    header: Vec<(String, String)>,
}

pub async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let client = connect(global).await?;
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| Failure::new(format!("the system has no random numbers: {error}")))?;
    let inbox_name = format!("_inbox.{:016x}", u64::from_be_bytes(random));
    let mut inbox = client.subscribe(&inbox_name).qos(Qos::AtMostOnce).open().await?;
    // Nobody wants the request any more when nobody waits for its answer.
    let request = client.publish(&args.topic, args.message).ttl(args.timeout.max(Duration::from_millis(1)));
    let request = args.header.iter().fold(request, |request, (key, value)| request.header(key, value));
    let answer = async {
        request.reply_to(&inbox_name).send().await?;
        inbox.next().await.ok_or(Error::Disconnected)
    };
    let answer = tokio::time::timeout(args.timeout, answer).await;
    let done = match answer {
        Ok(Ok(answer)) => show(global, answer),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => {
            Err(Failure::new(format!("no answer within {:?}: does anybody serve `{}`?", args.timeout, args.topic)))
        }
    };
    // The topic of the inbox goes with its subscription as far as the broker lets it; failing to say so changes nothing.
    drop(inbox.delete().await);
    client.close().await;
    done
}

fn show(global: &Global, answer: Delivery) -> Result<(), Failure> {
    if global.json {
        return print(&format!("{}\n", subscribe::to_json(&answer)));
    }
    print(&format!("{}\n", String::from_utf8_lossy(answer.payload_slice())))
}

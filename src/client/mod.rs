//! The client library: publish with confirms, subscribe as a stream, on a connection that mends itself.
//!
//! ```no_run
//! use blipmq::client::{Client, ClientOptions};
//!
//! # async fn example() -> Result<(), blipmq::client::Error> {
//! let client = Client::connect(ClientOptions::new("127.0.0.1:5555", "dev-key-1")).await?;
//! let mut orders = client.subscribe("orders").durable("billing").open().await?;
//! let confirmed = client.publish("orders", "one coffee").header("table", "7").send().await?;
//! println!("{:?} at level {:?}", confirmed.status, confirmed.level);
//! if let Some(order) = orders.next().await {
//!     println!("{:?}", order.payload());
//!     order.ack();
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Owns: one connection at a time, in a task of its own (`link`), and what must outlive it (`session`).
//! Never: blocks a thread, keeps anything without a bound. Needs a tokio runtime with time and I/O; one thread is enough.
//!
//! After a connection is lost, the client logs in again, subscribes again (durable subscriptions by their name), and sends
//! again every publish that was not confirmed, in order and with the same identity, so that the broker stores it once.

mod error;
mod link;
mod options;
mod publish;
mod session;
mod subscribe;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

pub use self::error::Error;
pub use self::options::{ClientOptions, Dedup, ReconnectPolicy};
pub use self::publish::{ConfirmFuture, Confirmed, PublishBuilder, Status};
pub use self::subscribe::{Delivery, Reject, SubscribeBuilder, Subscription};
pub use crate::protocol::request::Start;
pub use crate::types::{DeliveryTag, Durability, Lsn, Qos};

use self::link::{Handle, Shared};
use self::session::Session;

/// A connection to a broker, mended as often as need be. Clones share it. When the last clone and the last
/// [`Subscription`] are gone, what is under way is finished (see [`ClientOptions::linger`]) and the connection closed.
#[derive(Clone, Debug)]
pub struct Client {
    handle: Arc<Handle>,
}

/// Whether there is a connection at this moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ConnectionState {
    Connecting,
    Up,
    /// For good.
    Closed,
}

/// What the broker said of itself when the client last logged in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BrokerInfo {
    /// Cores it runs on.
    pub cores: u16,
    /// The one this connection is on.
    pub core: u16,
    /// Ports of the cores, if each has its own.
    pub ports: Vec<u16>,
    /// Largest frame it takes.
    pub frame_len_max: u32,
}

impl Client {
    /// Connects and logs in. Tries again within [`ReconnectPolicy::give_up_connect`], unless the broker refuses the key or
    /// does not speak the protocol.
    pub async fn connect(options: ClientOptions) -> Result<Client, Error> {
        options.check()?;
        let mut random = [0; 8];
        getrandom::fill(&mut random)
            .map_err(|error| Error::Closed { reason: format!("the system has no random numbers: {error}") })?;
        let key = Bytes::from(options.key.clone());
        let session = Session::new(u64::from_be_bytes(random), options.dedup, options.aliases, key);
        let shared = Arc::new(Shared::new(session, &options));
        let client = Client { handle: Arc::new(Handle::new(Arc::clone(&shared))) };
        let (first, connected) = oneshot::channel();
        tokio::spawn(link::run(shared, options, first));
        connected.await.unwrap_or_else(|_| Err(Error::Closed { reason: "its task was ended".into() }))?;
        Ok(client)
    }

    /// Begins a message: at QoS1 and confirmed unless told otherwise.
    pub fn publish(&self, topic: impl Into<Topic>, payload: impl Into<Bytes>) -> PublishBuilder<'_> {
        PublishBuilder::new(self, topic.into(), payload.into())
    }

    /// Begins a subscription: at QoS1 and ephemeral unless told otherwise.
    pub fn subscribe(&self, topic: impl Into<Topic>) -> SubscribeBuilder<'_> {
        SubscribeBuilder::new(self, topic.into())
    }

    /// Takes nothing new, waits for what is under way (at most [`ClientOptions::linger`]), and closes the connection.
    /// Publishes that were not confirmed by then get an error.
    pub async fn close(&self) {
        let mut state = self.state();
        self.shared().close();
        // An error would say that the task is gone, which is closed enough.
        drop(state.wait_for(|state| *state == ConnectionState::Closed).await);
    }

    /// Follows the connection.
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.shared().state()
    }

    /// What the broker said of itself.
    pub fn broker(&self) -> Option<BrokerInfo> {
        self.shared().lock().welcome().map(|welcome| BrokerInfo {
            cores: welcome.cores,
            core: welcome.core.0,
            ports: welcome.ports.clone(),
            frame_len_max: welcome.frame_len_max,
        })
    }

    /// Requests nobody waited for that the broker refused: publishes without confirm, late acknowledgements.
    pub fn refused_unconfirmed(&self) -> u64 {
        self.shared().lock().refused_unconfirmed()
    }

    fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    fn shared(&self) -> &Arc<Shared> {
        self.handle.shared()
    }
}

/// A topic's name. Make it once for a topic published to often: clones share the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Topic(Bytes);

impl Topic {
    pub fn new(name: impl Into<String>) -> Topic {
        Topic(Bytes::from(name.into()))
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("made from text")
    }

    fn check(&self) -> Result<(), Error> {
        match self.0.len() {
            1..=crate::limits::TOPIC_NAME_MAX => Ok(()),
            bytes => Err(Error::InvalidTopic { bytes }),
        }
    }
}

impl From<&str> for Topic {
    fn from(name: &str) -> Topic {
        Topic(Bytes::copy_from_slice(name.as_bytes()))
    }
}

impl From<String> for Topic {
    fn from(name: String) -> Topic {
        Topic::new(name)
    }
}

impl From<&String> for Topic {
    fn from(name: &String) -> Topic {
        Topic::from(name.as_str())
    }
}

impl From<&Topic> for Topic {
    fn from(topic: &Topic) -> Topic {
        topic.clone()
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

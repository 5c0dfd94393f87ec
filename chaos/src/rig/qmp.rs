//! The daemon's control socket: one line of JSON each way.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Fallible;

pub struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Qmp {
    pub fn connect(path: &Path) -> Fallible<Qmp> {
        let output = UnixStream::connect(path)?;
        output.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut qmp = Qmp { input: BufReader::new(output.try_clone()?), output };
        qmp.read()?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// `Err`: what the daemon says is wrong.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Fallible<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.output.write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                continue;
            }
            return match answer.get("error") {
                Some(error) => Err(format!("{command}: {error}").into()),
                None => Ok(answer["return"].take()),
            };
        }
    }

    fn read(&mut self) -> Fallible<Value> {
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            return Err("qemu-storage-daemon has closed its control socket".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

//! What is made, mounted and undone: folder, daemon, loop device, mount. Each undoes itself, the last made first.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::qmp::Qmp;
use super::writes::Counter;
use super::{FileSystem, find, tool};
use crate::Fallible;

/// Most the log of writes may take; memory is used as it fills.
const LOG_SIZE: u64 = 4 << 30;
/// A daemon, a device or a mount that is not there by then never will be.
const PATIENCE: Duration = Duration::from_secs(10);

/// A folder for one run.
pub struct Folder(PathBuf);

impl Folder {
    pub fn make(within: &Path, name: &str) -> Fallible<Folder> {
        let path = within.join(format!("blipmq-rig-{}-{name}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("chaos: {} stays: {error}", self.0.display());
        }
    }
}

/// A loop device over a file.
pub struct Loop {
    pub device: PathBuf,
}

impl Loop {
    pub fn over(file: &Path) -> Fallible<Loop> {
        let file = file.display().to_string();
        let begun = Instant::now();
        // Two that look for a free one at once may find the same.
        let device = loop {
            match tool("losetup", &["-f", "--show", &file]) {
                Ok(device) => break device,
                Err(_) if begun.elapsed() < Duration::from_secs(2) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error),
            }
        };
        Ok(Loop { device: device.into() })
    }

    /// As the kernel's log calls it.
    pub fn name(&self) -> String {
        self.device.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(error) = tool("losetup", &["-d", &self.device.display().to_string()]) {
            eprintln!("chaos: {error}");
        }
    }
}

/// A file system at a place.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    pub fn new(fs: FileSystem, device: &Path, at: &Path) -> Fallible<Mount> {
        fs::create_dir_all(at)?;
        // Copies of one XFS have one name; two of them are mounted at once.
        let options = if fs == FileSystem::Xfs { "noatime,nouuid" } else { "noatime" };
        let (device, place) = (device.display().to_string(), at.display().to_string());
        tool("mount", &["-t", fs.name(), "-o", options, &device, &place])?;
        Ok(Mount { at: at.to_path_buf() })
    }

    /// Everything written so far is on the device.
    pub fn sync(&self) -> Fallible<()> {
        tool("sync", &["-f", &self.at.display().to_string()]).map(|_| ())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let place = self.at.display().to_string();
        let begun = Instant::now();
        // A process that was killed may still hold it for a moment.
        while let Err(error) = tool("umount", &[&place]) {
            if begun.elapsed() > PATIENCE {
                eprintln!("chaos: {error}");
                tool("umount", &["-l", &place]).ok();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A disk image with a file system on it, mounted.
pub struct Mounted {
    // Dropped in this order.
    pub mount: Mount,
    _device: Loop,
}

impl Mounted {
    pub fn image(fs: FileSystem, image: &Path, at: &Path) -> Fallible<Mounted> {
        let device = Loop::over(image)?;
        let mount = Mount::new(fs, &device.device, at)?;
        Ok(Mounted { mount, _device: device })
    }
}

struct Daemon {
    child: Child,
    export: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        tool("kill", &["-TERM", &pid]).ok();
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begun.elapsed() > PATIENCE {
                self.child.kill().ok();
                self.child.wait().ok();
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if is_mounted(&self.export) {
            tool("umount", &["-l", &self.export.display().to_string()]).ok();
        }
    }
}

fn is_mounted(place: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let place = place.display().to_string();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(place.as_str()))
}

/// What goes wrong with the disk from now on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// `read`, `write` or `flush`.
    pub what: &'static str,
    pub errno: i32,
    /// The first one only.
    pub once: bool,
    /// Only where this byte of the disk is touched.
    pub at: Option<u64>,
}

/// The disk, its daemon and its device; mounted while `mount` is there.
pub struct Disk {
    // Dropped in this order.
    pub mount: Option<Mount>,
    pub device: Loop,
    /// `None`: the disk was replaced by a sound one.
    daemon: Option<(Daemon, Qmp)>,
    armed: Option<&'static str>,
    fs: FileSystem,
    folder: Folder,
}

impl Disk {
    /// A fresh file system, mounted. `within`: where its files are kept.
    pub fn make(fs: FileSystem, within: &Path, name: &str) -> Fallible<Disk> {
        let folder = Folder::make(within, name)?;
        let path = |name: &str| folder.path().join(name);
        let text = |name: &str| path(name).display().to_string();
        File::create(path("disk.img"))?.set_len(fs.disk_size())?;
        match fs {
            // Nothing is left for the kernel to initialise later: these would be most of the writes.
            FileSystem::Ext4 => {
                let lazy = "lazy_itable_init=0,lazy_journal_init=0";
                tool("mkfs.ext4", &["-q", "-b", "4096", "-E", lazy, &text("disk.img")])?
            }
            FileSystem::Xfs => tool("mkfs.xfs", &["-q", &text("disk.img")])?,
        };
        fs::copy(path("disk.img"), path("fresh.img"))?;
        File::create(path("log"))?.set_len(LOG_SIZE)?;
        File::create(path("export"))?;
        let daemon = Daemon { child: start_daemon(folder.path())?, export: path("export") };
        let mut disk = Starting { daemon };
        disk.until_exported(&path("export"), fs.disk_size())?;
        let qmp = Qmp::connect(&path("qmp"))?;
        let device = Loop::over(&path("export"))?;
        let mount = Some(Mount::new(fs, &device.device, &path("mnt"))?);
        Ok(Disk { mount, device, daemon: Some((disk.daemon, qmp)), armed: None, fs, folder })
    }

    /// Where the file system is or was mounted.
    pub fn place(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    /// The log of writes; complete when the daemon is gone.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The disk's contents before the file system was first mounted.
    pub fn fresh(&self) -> PathBuf {
        self.folder.path().join("fresh.img")
    }

    /// The disk's contents.
    pub fn contents(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    pub fn counter(&self) -> std::io::Result<Counter> {
        Counter::open(&self.log())
    }

    pub fn remount(&mut self) -> Fallible<()> {
        self.mount = None;
        self.mount = Some(Mount::new(self.fs, &self.device.device, &self.place())?);
        Ok(())
    }

    /// What is read comes from the disk, not from the page cache above it.
    pub fn forget_cache(&self) -> Fallible<()> {
        let export = format!("of={}", self.folder.path().join("export").display());
        tool("dd", &["if=/dev/null", &export, "conv=notrunc", "oflag=nocache", "count=0"])?;
        let device = self.device.device.display().to_string();
        tool("blockdev", &["--flushbufs", &device]).map(|_| ())
    }

    /// From now on these rules hold, and no others.
    pub fn arm(&mut self, rules: &[Rule]) -> Fallible<()> {
        self.heal()?;
        let rules: Vec<Value> = rules
            .iter()
            .map(|rule| {
                let mut rule_json =
                    json!({ "event": "none", "iotype": rule.what, "errno": rule.errno, "once": rule.once });
                if let Some(at) = rule.at {
                    rule_json["sector"] = json!(at / 512);
                }
                rule_json
            })
            .collect();
        let node = json!({ "driver": "blkdebug", "node-name": "errors", "image": "logged", "inject-error": rules });
        self.ask("blockdev-add", &node)?;
        self.armed = Some("errors");
        self.route("errors")
    }

    /// From now on the disk does at most so many operations a second.
    pub fn slow_down(&mut self, operations: u32) -> Fallible<()> {
        self.heal()?;
        let limits = json!({ "qom-type": "throttle-group", "id": "pace", "limits": { "iops-total": operations } });
        self.ask("object-add", &limits)?;
        let node = json!({ "driver": "throttle", "node-name": "slow", "throttle-group": "pace", "file": "logged" });
        self.ask("blockdev-add", &node)?;
        self.armed = Some("slow");
        self.route("slow")
    }

    /// The disk is sound again.
    pub fn heal(&mut self) -> Fallible<()> {
        let Some(armed) = self.armed.take() else { return Ok(()) };
        self.route("logged")?;
        self.ask("blockdev-del", &json!({ "node-name": armed }))?;
        if armed == "slow" {
            self.ask("object-del", &json!({ "id": "pace" }))?;
        }
        Ok(())
    }

    /// The same contents on a disk without faults, mounted anew; its writes are not logged. A disk that cannot be flushed does
    /// not let go of its errors otherwise.
    pub fn replace(&mut self) -> Fallible<()> {
        self.mount = None;
        self.device = Loop::over(&self.contents())?;
        self.daemon = None;
        self.armed = None;
        self.remount()
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Fallible<Value> {
        let (_, qmp) = self.daemon.as_mut().ok_or("the disk has been replaced")?;
        qmp.ask(command, arguments)
    }

    fn route(&mut self, through: &str) -> Fallible<()> {
        let options = json!({ "options": [{ "driver": "raw", "node-name": "top", "file": through }] });
        self.ask("blockdev-reopen", &options).map(|_| ())
    }

    /// Ends the daemon; log and contents stay until the returned folder is dropped.
    pub fn finish(mut self) -> Folder {
        self.mount = None;
        drop(self.device);
        drop(self.daemon);
        self.folder
    }
}

struct Starting {
    daemon: Daemon,
}

impl Starting {
    fn until_exported(&mut self, export: &Path, size: u64) -> Fallible<()> {
        let begun = Instant::now();
        while !(is_mounted(export) && fs::metadata(export).is_ok_and(|meta| meta.len() == size)) {
            let ended = self.daemon.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let words = fs::read_to_string(export.with_file_name("daemon.txt")).unwrap_or_default();
                return Err(format!("qemu-storage-daemon exports nothing: {}", words.trim()).into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

fn start_daemon(folder: &Path) -> Fallible<Child> {
    use std::os::unix::process::CommandExt;
    let path = |name: &str| folder.join(name).display().to_string();
    let program = find("qemu-storage-daemon").ok_or("qemu-storage-daemon is missing")?;
    let words = File::create(folder.join("daemon.txt"))?;
    let child = Command::new(program)
        .args(["--chardev", &format!("socket,path={},server=on,wait=off,id=control", path("qmp"))])
        .args(["--monitor", "chardev=control"])
        .args(["--blockdev", &format!("driver=file,node-name=disk,filename={},cache.no-flush=on", path("disk.img"))])
        .args(["--blockdev", &format!("driver=file,node-name=log,filename={},cache.no-flush=on", path("log"))])
        .arg("--blockdev")
        .arg("driver=blklogwrites,node-name=logged,file=disk,log=log,log-sector-size=512,log-super-update-interval=1")
        .args(["--blockdev", "driver=raw,node-name=top,file=logged"])
        .args(["--export", &format!("type=fuse,id=export,node-name=top,mountpoint={},writable=on", path("export"))])
        // A Ctrl-C is for us: it must live until we have unmounted.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(words.try_clone()?)
        .stderr(words)
        .spawn()?;
    Ok(child)
}

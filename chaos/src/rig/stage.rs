//! A broker on the rig's disk with its subscriptions made: where every recorded run begins.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::FileSystem;
use super::device::Disk;
use super::load::Load;
use crate::Fallible;
use crate::broker::{self, Broker, Setup};
use crate::rng::Rng;

pub const READY_PATIENCE: Duration = Duration::from_secs(30);

/// What to put on the stage.
#[derive(Clone, Debug)]
pub struct Scene {
    pub fs: FileSystem,
    pub policy: String,
    pub broker: PathBuf,
    /// Where disks are kept while they are needed.
    pub workplace: PathBuf,
    /// Further environment of the broker, such as a planted bug; last word.
    pub extra: Vec<(String, String)>,
}

pub struct Stage {
    // Dropped in this order.
    pub load: Load,
    pub broker: Broker,
    pub setup: Setup,
    pub cores: u16,
    /// What chance chose for the broker; without its place.
    pub settings: Vec<(String, String)>,
    pub disk: Disk,
}

impl Stage {
    /// Subscriptions exist, and are on the disk.
    pub fn set(scene: &Scene, name: &str, rng: &mut Rng) -> Fallible<Stage> {
        let cores = *rng.pick(&[1, 1, 2]);
        let mut pick = |name: &str, from: &[&str]| (format!("BLIPMQ_STORAGE_{name}"), rng.pick(from).to_string());
        let settings = vec![
            // Small, so that rotation, recycling and relocation happen all the time.
            pick("SEGMENT_SIZE", &["1MiB", "1MiB", "4MiB"]),
            pick("WAL_SYNC", &["dsync", "fdatasync"]),
            pick("CHECKPOINT_INTERVAL_MS", &["20", "100", "1000"]),
            pick("MEMORY_BUDGET", &["32MiB"]),
        ];
        let disk = Disk::make(scene.fs, &scene.workplace, name)?;
        let folder = disk.fresh().with_file_name("broker");
        fs::create_dir_all(&folder)?;
        let mut extra = settings.clone();
        extra.extend(scene.extra.iter().cloned());
        let setup = setup(scene, &folder, &disk.place(), extra, rng.draw())?;
        let mut broker = setup.start(1, cores)?;
        broker.wait_ready(setup.address(), READY_PATIENCE)?;
        let history = folder.join("history.txt");
        let load = Load::start(&setup, &mut broker, &history, rng.draw(), disk.counter()?)?;
        disk.mount.as_ref().ok_or("the disk is not mounted")?.sync()?;
        Ok(Stage { load, broker, setup, cores, settings, disk })
    }
}

/// For a broker whose store is below `place`. `folder`: for its output.
pub fn setup(
    scene: &Scene,
    folder: &Path,
    place: &Path,
    mut extra: Vec<(String, String)>,
    seed: u64,
) -> Fallible<Setup> {
    extra.push(("BLIPMQ_WAL_PATH".into(), place.join("store").display().to_string()));
    let (port, metrics_port) = broker::free_ports(seed)?;
    let (program, folder, policy) = (scene.broker.clone(), folder.to_path_buf(), scene.policy.clone());
    Ok(Setup { program, folder, policy, port, metrics_port, extra })
}

//! Topic name -> virtual shard -> core.
//!
//! Owns: the one hash that places topics. It is part of the store's format: a topic's records lie in the log of the
//! virtual shard this function names, so it may change only with the store's format version.

use crate::types::VShard;

/// The virtual shard of the topic `name`, 0..vshards.
///
/// - `dead_letter_suffix`: as fixed in the store. It is not part of what is hashed, so that a topic and its
///   dead-letter topic share one virtual shard, and moving a message between them is one atomic batch.
/// - Hash: FNV-1a, 64 bit (Fowler, Noll, Vo), folded to 32 bit; stable for ever.
pub fn vshard_of(name: &[u8], dead_letter_suffix: &[u8], vshards: u16) -> VShard {
    let stem = match name.strip_suffix(dead_letter_suffix) {
        Some(stem) if !stem.is_empty() => stem,
        _ => name,
    };
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in stem {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let folded = (hash >> 32) ^ hash;
    VShard(((folded & 0xffff_ffff) % u64::from(vshards)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placement_is_pinned() {
        // These values are on people's disks.
        assert_eq!(vshard_of(b"demo", b".dlq", 64), VShard(49));
        assert_eq!(vshard_of(b"orders", b".dlq", 64), VShard(30));
    }

    #[test]
    fn a_dead_letter_topic_lives_with_its_source() {
        for n in 0..1000 {
            let name = format!("topic-{n}");
            let dead = format!("{name}.dlq");
            assert_eq!(vshard_of(name.as_bytes(), b".dlq", 64), vshard_of(dead.as_bytes(), b".dlq", 64));
        }
        assert_ne!(vshard_of(b".dlq", b".dlq", 1024), vshard_of(b"", b".dlq", 1024));
    }

    #[test]
    fn topics_spread_over_all_virtual_shards() {
        let mut count = [0u32; 64];
        for n in 0..6400 {
            count[usize::from(vshard_of(format!("t{n}").as_bytes(), b".dlq", 64).0)] += 1;
        }
        assert!(count.iter().all(|n| (40..=180).contains(n)), "{count:?}");
    }
}

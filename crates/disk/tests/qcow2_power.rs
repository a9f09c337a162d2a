//! qcow2 images in memory that are cut off after any change: as when the process is killed, when
//! the host loses power, and when its file system is full. `DISK_CUTS` sets how many points of each
//! run are tried.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::qcow2::{BackingName, CreateOptions, Qcow2, Repair, Version};
use disk::{Disk, DiskError, ExtentKind};
use recording::{Format, Memory};
use std::sync::Arc;

const SIZE: u64 = 2 << 20;

fn options() -> CreateOptions {
    CreateOptions { cluster_size: 4096, ..CreateOptions::new(SIZE) }
}

/// A disk that reads as zeroes and says that it has data.
struct Below;

impl Disk for Below {
    fn size(&self) -> u64 {
        SIZE - 100 * 512
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        buffer.fill(0);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn extent(&self, _: u64, length: u64) -> Result<disk::Extent, DiskError> {
        Ok(disk::Extent { kind: ExtentKind::Data, length })
    }
}

fn open(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    Ok(Box::new(Qcow2::open_in(memory, &|_| Ok(Arc::new(Below)))?))
}

/// Has an image with these options cut off in every way.
fn survives(options: &CreateOptions, seed: u64) {
    let create = |memory: Arc<Memory>| {
        Qcow2::create_in(&memory, options).unwrap();
        open(memory).unwrap()
    };
    let inspect = |bytes: &[u8]| {
        let report = Qcow2::check_in(Memory::read_only(bytes.to_vec()), Repair::Nothing).unwrap();
        // Version 2 has no mark by which to see that it was not closed.
        let leaks_may_be = options.version == Version::V2;
        assert!(report.is_clean() || (report.errors == 0 && leaks_may_be), "{report:?}");
    };
    let format = Format { create: &create, open: &open, inspect: &inspect };
    let cuts = std::env::var("DISK_CUTS").map_or(20, |number| number.parse().unwrap());
    recording::survives_being_killed(&format, 120, cuts, seed);
    recording::survives_losing_power(&format, 120, cuts, seed);
    recording::survives_a_full_store(&format, seed);
}

#[test]
fn an_image_is_sound_wherever_it_is_cut_off() {
    survives(&options(), 1);
}

#[test]
fn an_image_with_small_clusters_is_sound_wherever_it_is_cut_off() {
    survives(&CreateOptions { cluster_size: 512, ..options() }, 2);
}

#[test]
fn an_image_with_lazy_refcounts_is_sound_wherever_it_is_cut_off() {
    survives(&CreateOptions { lazy_refcounts: true, ..options() }, 3);
}

#[test]
fn an_image_of_version_2_is_sound_wherever_it_is_cut_off() {
    survives(&CreateOptions { version: Version::V2, ..options() }, 4);
}

#[test]
fn an_overlay_is_sound_wherever_it_is_cut_off() {
    let backing = BackingName { name: "below".to_owned(), format: Some("raw".to_owned()) };
    survives(&CreateOptions { backing: Some(backing), cluster_size: 16 << 10, ..options() }, 5);
}

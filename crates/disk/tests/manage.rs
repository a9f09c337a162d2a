//! What is done to images of any format as a whole.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, OpenOptions};
use disk::qcow2::{Repair, Shrink};
use disk::{Format, manage, overlay};
use support::{Random, folder, qemu};

#[test]
fn images_of_all_formats_tell_what_they_are_and_are_sound() {
    let folder = folder();
    for made in Format::ALL {
        let path = folder.path().join(made.name());
        let disk = format::create(&path, made, 8 << 20).unwrap();
        disk.write_at(1 << 20, &Random(1).bytes(100_000)).unwrap();
        disk.flush().unwrap();
        // A look is possible while it is in use, a check is not. VHDX may have changes in its log.
        let told = (made == Format::Raw).then_some(made);
        if made != Format::Vhdx {
            assert!(manage::info(&path, told).unwrap().allocated >= 100_000);
        }
        assert!(manage::check(&path, told, Repair::Nothing).is_err());
        drop(disk);
        let info = manage::info(&path, told).unwrap();
        assert_eq!((info.format, info.size), (made, 8 << 20));
        assert_eq!(info.qcow2.is_some(), made == Format::Qcow2);
        for repair in [Repair::Nothing, Repair::Everything] {
            let report = manage::check(&path, told, repair).unwrap();
            assert!(report.is_clean(), "{made}: {report:?}");
        }
    }
}

#[test]
fn raw_and_qcow2_images_change_their_size_and_others_say_what_to_do() {
    let folder = folder();
    for made in Format::ALL {
        let path = folder.path().join(made.name());
        format::create(&path, made, 8 << 20).unwrap().write_at(7 << 20, &[1; 512]).unwrap();
        let resize = |size, shrink| manage::resize(&path, Some(made), size, shrink);
        if !matches!(made, Format::Raw | Format::Qcow2) {
            let error = resize(16 << 20, Shrink::Refuse).unwrap_err().to_string();
            assert!(error.contains("convert it to qcow2 or raw"), "{error}");
            continue;
        }
        resize(16 << 20, Shrink::Refuse).unwrap();
        assert!(resize(12 << 20, Shrink::Refuse).is_err());
        assert!(resize(4 << 20, Shrink::IfUnused).is_err());
        resize(12 << 20, Shrink::IfUnused).unwrap();
        let disk = format::open(&path, Some(made), OpenOptions::read()).unwrap();
        assert_eq!(disk.size(), 12 << 20);
        let mut sector = [0; 512];
        disk.read_at(7 << 20, &mut sector).unwrap();
        assert_eq!(sector, [1; 512]);
    }
}

#[test]
fn overlays_stand_on_every_format_and_follow_moves_of_their_folder() {
    let folder = folder();
    let inside = folder.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    let content = Random(7).bytes(50_000);
    for below in Format::ALL {
        let base = inside.join(below.name());
        let disk = format::create(&base, below, 8 << 20).unwrap();
        disk.write_at(12_345, &content).unwrap();
        drop(disk);
        overlay::create(&inside.join(format!("over-{below}")), &base, below).unwrap();
    }
    let moved = folder.path().join("moved");
    std::fs::rename(&inside, &moved).unwrap();
    for below in Format::ALL {
        let path = moved.join(format!("over-{below}"));
        let disk = format::open(&path, None, OpenOptions::write()).unwrap();
        let mut read = vec![0; content.len()];
        disk.read_at(12_345, &mut read).unwrap();
        assert!(read == content, "{below}");
        disk.write_at(12_345, b"over").unwrap();
        drop(disk);
        qemu("qemu-img", ["check", path.to_str().unwrap()]);
        let base = format::open(&moved.join(below.name()), Some(below), OpenOptions::read());
        base.unwrap().read_at(12_345, &mut read).unwrap();
        assert!(read == content, "{below}");
    }
}

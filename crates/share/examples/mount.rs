//! Mounts a share on this machine, so that its own kernel and programs can try the server without
//! a guest (needs root): `cargo run -p share --example mount -- FOLDER MOUNTPOINT [ro]`. It ends
//! when the mount point is unmounted.
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use share::{Limits, MAX_REPLY, MAX_REQUEST, Options, Server};
use std::error::Error;
use std::ffi::CString;
use std::os::fd::AsRawFd as _;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (folder, mount_point, read_only) = match arguments.as_slice() {
        [folder, point] => (folder, point, false),
        [folder, point, mode] if mode == "ro" => (folder, point, true),
        _ => return Err("usage: mount FOLDER MOUNTPOINT [ro]".into()),
    };
    let limits = Limits::for_descriptors(800);
    let server = Server::new(&Options { folder: folder.into(), read_only, owner: None, limits })?;
    let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let data = CString::new(format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    ))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount(folder.as_str(), mount_point.as_str(), "fuse", flags, data.as_c_str())?;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| serve(&server, &device));
        }
    });
    Ok(())
}

fn serve(server: &Server, device: impl std::os::fd::AsFd) {
    let (mut request, mut reply) = (vec![0; MAX_REQUEST], Vec::new());
    loop {
        match rustix::io::read(&device, &mut request[..]) {
            Ok(length) => {
                let request = request.get(..length).unwrap_or_default();
                server.serve(request, MAX_REPLY, &mut reply);
                // A reply to a request that was interrupted is not wanted any more.
                if !reply.is_empty() {
                    let _ = rustix::io::write(&device, &reply);
                }
            }
            Err(Errno::NODEV) => return,
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(errno) => return eprintln!("/dev/fuse: {errno}"),
        }
    }
}

//! Processes: children of this same program, their pipes, arguments, and ends.

use crate::hash::{Generator, sha256};
use crate::{memory, signals};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;

/// This program again, to [`play`] a role.
pub fn child(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments);
    command
}

/// What a child does.
pub fn play(role: &str, arguments: &[String]) -> ExitCode {
    let mut text = Vec::new();
    match (role, arguments) {
        ("count", []) => memory::count_in_shared_file(),
        ("die", [how]) => signals::die(how),
        ("exit", [status]) => return status.parse::<u8>().unwrap().into(),
        ("upper", []) => {
            std::io::stdin().read_to_end(&mut text).unwrap();
            text.make_ascii_uppercase();
            std::io::stdout().write_all(&text).unwrap();
        }
        ("digest", []) => {
            std::io::stdin().read_to_end(&mut text).unwrap();
            println!("{}", sha256(&text));
        }
        ("tree", [depth]) => print!("{}", tree(depth.parse().unwrap())),
        ("say", _) => println!("{arguments:?} {:?}", std::env::var("ROLE")),
        _ => return ExitCode::from(99),
    }
    ExitCode::SUCCESS
}

/// A tree of processes, each of which adds itself to what its children say.
fn tree(depth: u8) -> String {
    if depth == 0 {
        return "x".into();
    }
    let branch = || {
        let next = (depth - 1).to_string();
        child(&["tree", &next]).stdout(Stdio::piped()).spawn().unwrap()
    };
    let (left, right) = (branch(), branch());
    let said = |child: Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    format!("({}{})", said(left), said(right))
}

pub fn exercise() {
    let output = child(&["say", "two words", "", "ünï"]).env("ROLE", "child").output().unwrap();
    print!("processes: said {}", String::from_utf8_lossy(&output.stdout));
    println!("processes: tree {}", tree(3));
    ends();
    pipes();
}

fn ends() {
    let statuses: Vec<Option<i32>> =
        [0, 1, 77, 255].map(|n| child(&["exit", &n.to_string()]).status().unwrap().code()).into();
    println!("processes: exited {statuses:?}");
    for how in [
        "invalid opcode",
        "division by zero",
        "division overflow",
        "null",
        "not canonical",
        "breakpoint",
        "privileged",
        "port",
        "x87",
        "sse",
        "jump",
        "stack",
        "abort",
    ] {
        let status = child(&["die", how]).status().unwrap();
        println!("processes: {how}: signal {:?}", status.signal());
    }
    let mut waiting = child(&["digest"]).stdin(Stdio::piped()).spawn().unwrap();
    waiting.kill().unwrap();
    println!("processes: killed {:?}", waiting.wait().unwrap().signal());
    println!("processes: missing {:?}", Command::new("/no/such").spawn().unwrap_err().kind());
}

/// Two children in a pipeline, fed by a thread, and several at once.
fn pipes() {
    let data: String = (0..20_000u64).map(|n| format!("{:x} ", Generator(n + 1).next())).collect();
    let mut upper = child(&["upper"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let digest = child(&["digest"])
        .stdin(upper.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = upper.stdin.take().unwrap();
    let text = data.clone();
    let feeder = thread::spawn(move || input.write_all(text.as_bytes()).unwrap());
    let said = String::from_utf8(digest.wait_with_output().unwrap().stdout).unwrap();
    feeder.join().unwrap();
    assert!(upper.wait().unwrap().success());
    assert_eq!(said.trim(), sha256(data.to_uppercase().as_bytes()));
    print!("processes: {said}");

    let children: Vec<Child> = (0..12)
        .map(|n| {
            let digest = child(&["digest"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
            let mut digest = digest.unwrap();
            let part = &data.as_bytes()[n * 1000..][..1000];
            digest.stdin.take().unwrap().write_all(part).unwrap();
            digest
        })
        .collect();
    let digests: Vec<u8> =
        children.into_iter().flat_map(|child| child.wait_with_output().unwrap().stdout).collect();
    println!("processes: twelve {}", sha256(&digests));
}

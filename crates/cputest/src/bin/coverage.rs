//! Prints `COVERAGE.md`.
fn main() {
    print!("{}", cputest::coverage::markdown());
}

//! Ways to hurt a server's process: signals, disks that are full or fail, networks that part.

use crate::Cluster;
use anyhow::{Context as _, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let done =
        Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    let why = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program} {}: {why}", arguments.join(" "));
    Ok(())
}

/// Whether this machine lets tests mount file systems and make network namespaces (that takes root).
/// Says so if not.
pub fn may_make_namespaces() -> bool {
    let can = run("unshare", &["--mount", "--net", "true"]).is_ok();
    if !can {
        eprintln!("not tested here: this needs the right to make namespaces (root)");
    }
    can
}

impl Cluster {
    /// Sends a signal such as `STOP` to a server.
    pub fn signal(&self, server: usize, signal: &str) -> anyhow::Result<()> {
        let process = self.process(server).context("it does not run")?;
        run("kill", &[&format!("-{signal}"), &process.to_string()])?;
        // A process that runs just now stops a moment later, and may have answered somebody by then.
        let stopped = || {
            let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("State:") && line.contains("(stopped)"))
        };
        while signal == "STOP" && !stopped() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Ok(())
    }

    /// Makes the programs through which a server is started give its folder a file system of its own, of
    /// this size, that only it sees.
    pub fn on_small_disk(&mut self, server: usize, size: &str) {
        let folder = self.server_dir(server).display().to_string();
        let script = format!(
            "set -e; mkdir -p '{folder}.kept'; cp -a '{folder}/.' '{folder}.kept'; \
             mount -t tmpfs -o mode=700,size={size} tmpfs '{folder}'; cp -a '{folder}.kept/.' '{folder}'; exec \"$@\""
        );
        self.start_through(server, ["unshare", "--mount", "sh", "-c", &script, "sh"]);
    }
    /// Changes the size of that file system while the server runs.
    pub fn resize_disk(&self, server: usize, size: &str) -> anyhow::Result<()> {
        let process = self.process(server).context("it does not run")?.to_string();
        let folder = self.server_dir(server).display().to_string();
        let option = format!("remount,size={size}");
        run("nsenter", &["--mount", "--target", &process, "mount", "-o", &option, &folder])
    }

    /// Builds a library that changes what a program sees of its machine.
    fn preloaded(&self, name: &str) -> anyhow::Result<PathBuf> {
        let library = self.dir().join(format!("{name}.so"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/{name}.c"));
        let (to, from) = (library.display().to_string(), source.display().to_string());
        run("cc", &["-shared", "-fPIC", "-O1", "-o", &to, &from, "-ldl"])?;
        Ok(library)
    }
    /// What to put into the environment of a program whose clock is to be off by so many seconds.
    pub fn clock_off_by(&self, seconds: i64) -> anyhow::Result<[(&'static str, String); 2]> {
        let library = self.preloaded("other_clock")?.display().to_string();
        Ok([("LD_PRELOAD", library), ("KDS_CLOCK_OFF", seconds.to_string())])
    }
    /// Makes a server start with a disk that fails, or so that it dies, when the file that this gives is there: what
    /// happens then stands in `failing_disk.c`, by this name.
    pub fn with_switch(&mut self, server: usize, name: &str) -> anyhow::Result<PathBuf> {
        let library = self.preloaded("failing_disk")?;
        let switch = self.dir().join(format!("switch-{server}"));
        let preload = format!("LD_PRELOAD={}", library.display());
        self.start_through(server, ["env", &preload, &format!("{name}={}", switch.display())]);
        Ok(switch)
    }
}

/// A network of namespaces, one for each server, joined by a bridge at which the tests' own clients are.
pub struct Network {
    name: String,
    servers: usize,
}

impl Network {
    /// Lays the cables. `number` tells networks of one machine apart.
    pub fn new(servers: usize, number: u8) -> anyhow::Result<Self> {
        let network = Self { name: format!("kds{number}x{}", std::process::id() % 100_000), servers };
        let bridge = &network.name;
        run("ip", &["link", "add", bridge, "type", "bridge"])?;
        run("ip", &["addr", "add", &format!("10.213.{number}.254/24"), "dev", bridge])?;
        run("ip", &["link", "set", bridge, "up"])?;
        for server in 0..servers {
            let (space, outer, inner) = (network.space(server), network.cable(server), format!("i{server}"));
            run("ip", &["netns", "add", &space])?;
            run("ip", &["link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", &space])?;
            run("ip", &["link", "set", &outer, "master", bridge, "up"])?;
            let address = format!("10.213.{number}.{}/24", server + 1);
            run("ip", &["-n", &space, "addr", "add", &address, "dev", &inner])?;
            run("ip", &["-n", &space, "link", "set", &inner, "up"])?;
            run("ip", &["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }
    /// Addresses of the servers.
    pub fn hosts(number: u8, servers: usize) -> Vec<String> {
        (1..=servers).map(|server| format!("10.213.{number}.{server}")).collect()
    }
    /// What starts a program at a server's place.
    pub fn enter(&self, server: usize) -> [String; 4] {
        ["ip".into(), "netns".into(), "exec".into(), self.space(server)]
    }
    /// Cuts a server off from everybody, or joins it again.
    pub fn cut(&self, server: usize, off: bool) -> anyhow::Result<()> {
        run("ip", &["link", "set", &self.cable(server), if off { "down" } else { "up" }])
    }
    fn space(&self, server: usize) -> String {
        format!("{}-{server}", self.name)
    }
    fn cable(&self, server: usize) -> String {
        format!("{}c{server}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for server in 0..self.servers {
            let _ = run("ip", &["link", "del", &self.cable(server)]);
            let _ = run("ip", &["netns", "del", &self.space(server)]);
        }
        let _ = run("ip", &["link", "del", &self.name]);
    }
}

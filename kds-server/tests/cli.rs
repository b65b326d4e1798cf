//! The command line of the server: what it writes, and what it refuses.

use std::path::Path;
use std::process::{Command, Output};

fn server(args: &[&str]) -> Output {
    // A server that starts where it should refuse does not hold up everything.
    let program = env!("CARGO_BIN_EXE_kds-server");
    Command::new("timeout").args(["60", program]).args(args).output().expect("kds-server starts")
}
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn plan_prints_the_designs_table_and_refuses_the_impossible() {
    let plan = server(&["plan", "--servers", "49", "--masked", "2", "--threshold", "4", "--json"]);
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(
        (&plan["f"], &plan["q"], &plan["rows"], &plan["columns"]),
        (&16.into(), &33.into(), &1.into(), &3.into())
    );
    assert!(plan["warnings"][0].as_str().unwrap().contains("secrecy"));
    for (args, says) in [
        (&["plan", "--servers", "10"][..], "square"),
        (&["plan", "--servers", "9", "--masked", "2"], "cannot mask 2"),
        (&["plan", "--servers", "25", "--threshold", "9"], "C(n, k−2)"),
    ] {
        let refused = server(args);
        assert!(!refused.status.success());
        assert!(text(&refused.stderr).contains(says), "{}", text(&refused.stderr));
    }
    assert_eq!(server(&["plan"]).status.code(), Some(2));
    // Numbers of any size are refused in words.
    let folder = tempfile::tempdir().unwrap();
    for most in ["0", "4294967295", "18446744073709551615", "18446744073709551616"] {
        let made = folder.path().join(most);
        for args in [
            &["plan", "--servers", most][..],
            &["plan", "--servers", "16", "--masked", most, "--threshold", most],
            &["init", "--servers", "4", "--dir", made.to_str().unwrap(), "--epoch-seconds", most],
            &["guard", "--config", "none", "--period-seconds", most],
        ] {
            let refused = server(args);
            assert!(matches!(refused.status.code(), Some(1 | 2)), "{args:?}: {}", text(&refused.stderr));
        }
        assert!(!made.exists(), "what is refused leaves nothing behind");
    }
}

#[test]
fn init_writes_private_files_and_never_overwrites() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("c");
    let dir = dir.to_str().unwrap();
    let made = server(&["init", "--servers", "4", "--dir", dir, "--base-port", "7000"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for private in ["admin.key", "server-0/identity.key", "server-3/tls.key", "server-3/config.toml"] {
        let mode = std::fs::metadata(Path::new(dir).join(private)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{private}");
    }
    let manifest = std::fs::read_to_string(Path::new(dir).join("manifest.toml")).unwrap();
    assert!(manifest.contains("https://127.0.0.1:7006") && manifest.contains("127.0.0.1:7007"));
    let again = server(&["init", "--servers", "4", "--dir", dir]);
    assert!(!again.status.success());
    assert!(text(&again.stderr).contains("exists already"));
}

#[test]
fn run_says_what_to_do_about_wrong_files() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    assert!(server(&["init", "--servers", "4", "--dir", dir]).status.success());
    let path = |name: &str| folder.path().join(name);
    let run = |says: &str| {
        let refused = server(&["run", "--config", path("server-0/config.toml").to_str().unwrap()]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(says), "wanted {says:?}, got {}", text(&refused.stderr));
    };
    // Another server's identity.
    let (own, other) = (path("server-0/identity.key"), path("server-1/identity.key"));
    std::fs::rename(&own, path("kept")).unwrap();
    std::fs::copy(&other, &own).unwrap();
    run("was it replaced, or the folder copied from elsewhere?");
    std::fs::rename(path("kept"), &own).unwrap();
    // A file that others can read.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o644)).unwrap();
    run("chmod 600");
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600)).unwrap();
    // A manifest that was changed.
    let manifest = std::fs::read_to_string(path("manifest.toml")).unwrap();
    std::fs::write(path("manifest.toml"), manifest.replace("epoch_seconds = 30", "epoch_seconds = 31"))
        .unwrap();
    run("it was changed");
    std::fs::write(path("manifest.toml"), manifest.replace("quorum = 3", "quorum = 2")).unwrap();
    run("thresholds contradict");
    std::fs::write(path("manifest.toml"), &manifest).unwrap();
    std::fs::remove_file(path("server-0/kds.db")).unwrap();
    std::fs::create_dir(path("server-0/kds.db")).unwrap();
    run("cannot open the database");
    std::fs::remove_dir(path("server-0/kds.db")).unwrap();
    let missing = server(&["run", "--config", path("none").to_str().unwrap()]);
    assert!(text(&missing.stderr).contains("kds-server init"));
}

/// As one does who has changed into the folder; and what a server starts logs as it does.
#[test]
fn a_server_runs_from_its_own_folder_and_its_signer_logs_alike() {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    assert!(server(&["init", "--servers", "4", "--dir", dir]).status.success());
    let mut running = Command::new(env!("CARGO_BIN_EXE_kds-server"))
        .args(["--log-json", "run", "--config", "config.toml"])
        .current_dir(folder.path().join("server-0"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(running.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut said = Vec::new();
    for line in lines {
        said.push(
            serde_json::from_str::<serde_json::Value>(&line).unwrap_or_else(|_| panic!("no JSON: {line}")),
        );
        if said.last().is_some_and(|line| line["fields"]["message"] == "running") {
            break;
        }
    }
    let started = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", running.id()));
    let started = started.unwrap_or_default();
    let signer =
        started.split_whitespace().next().map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap());
    running.kill().unwrap();
    running.wait().unwrap();
    assert!(said.last().is_some_and(|line| line["fields"]["message"] == "running"), "{said:?}");
    // Some systems do not say who the children are.
    if let Some(signer) = signer {
        assert!(text(&signer).contains("--log-json"), "{}", text(&signer));
    }
}

#[test]
fn what_a_server_cannot_do_is_said_of_whom_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    assert!(server(&["init", "--servers", "4", "--dir", dir]).status.success());
    let config = folder.path().join("server-0/config.toml");
    let run = |filter: &str| {
        let mut command = Command::new("timeout");
        command.args(["60", env!("CARGO_BIN_EXE_kds-server"), "run", "--config"]).arg(&config);
        command.env("RUST_LOG", filter).output().unwrap()
    };
    let refused = run("kds_server=loud[");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("is no filter for logs"), "{}", text(&refused.stderr));
    // Where its state cannot be written, as on a full disk.
    std::fs::create_dir(folder.path().join("server-0/signer.new")).unwrap();
    let refused = run("info");
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(said.contains("the signer cannot write down what it certifies"), "{said}");
    assert!(said.contains("cannot write") && said.contains("signer.state"), "{said}");
}

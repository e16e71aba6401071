"""The commands of `apportion`, one file each; each has `run(arguments) -> exit code`."""

"""The commands of `apportion`, one file each, with a function `run(arguments) -> exit code`."""

"""The command line: `harness train`, `launch`, `debug`, `checkpoints`, `sync`. It imports `harness`, never the other way round."""

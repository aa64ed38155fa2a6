"""The command line: what `harness` on a terminal does. It imports `harness`, never the other way round."""

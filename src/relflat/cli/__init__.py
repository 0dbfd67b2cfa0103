"""The command line: parse, call, print. Everything that is worth testing lives in `relflat.lab`."""

"""The main job on real input, printed: a broker, a daemon, manuals, three sensor events."""

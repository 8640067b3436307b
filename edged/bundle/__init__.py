"""Offline bundles: gathered, signed and packed on a PC, checked and unpacked on the device without a network."""

"""Quantisation methods: what chooses the integers and scales of blocks, one file each."""

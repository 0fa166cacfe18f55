"""Runs of runs: repeat, tune, curve, coach, launch. Each only calls the api. Nothing is here yet."""

"""Schedules of every kernel on a CPU that is not the balanced operator."""

"""Starts a job on one Ascend machine or several."""

"""Plugging the loss into a parallel run: process groups, vocabulary-parallel layers."""

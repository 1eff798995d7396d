"""Driving a body from its history: pure, without a database, a clock or an event loop."""

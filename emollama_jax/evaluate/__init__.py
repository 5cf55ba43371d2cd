"""Measuring: metrics (pure), the protocol that turns answers into labels, the report page."""

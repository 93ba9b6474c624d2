"""The networks that LAVISH is measured against, each checked before it is timed."""

"""Sources of video and actions."""

"""The phone-screen benchmark: generated screens, written or spoken instructions, and actions."""

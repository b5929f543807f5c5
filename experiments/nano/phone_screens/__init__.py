"""The phone-screen benchmark: drawn screens, text or spoken instructions, actions to predict."""

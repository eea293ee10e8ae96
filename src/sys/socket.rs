//! Socket calls and options that std, nix and socket2 do not have safely.

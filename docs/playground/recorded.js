// The list of recorded runs: whichever is chosen is shown by the player under it.

const list = document.querySelector("#pg-recorded");
const players = document.querySelectorAll("trace-player");
const player = players[players.length - 1];
list.addEventListener("change", () => player.open(new URL(`../traces/${list.value}.json`, import.meta.url)));

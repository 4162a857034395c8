// The server's key, asked for in a dialog.

import { keepKey } from "./api.js";
import { byId } from "./dom.js";

/** Ask, `again` after one that was wrong; the key is kept until the tab closes. */
export async function askKey(again) {
  const dialog = byId("ask-key");
  byId("key-told").textContent = again
    ? "The key was not accepted. Type it again."
    : "Whoever runs it can tell you the key. It is forgotten when you close this tab.";
  byId("key").value = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (byId("key").value) keepKey(byId("key").value);
}

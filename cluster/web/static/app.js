// Starts the page: tabs, the key button, the two views. Knows the views, not what they show.
// The open tab is in the address (#cluster), so that it can be linked and survives a reload.

import { startCluster } from "./cluster.js";
import { $ } from "./dom.js";
import { askForKey, currentKey, onKeyChange } from "./key.js";
import { startPlayground } from "./playground.js";

const TABS = ["playground", "cluster"];

function select(name, { focus = false } = {}) {
  for (const tab of TABS) {
    const button = $(`tab-${tab}`);
    const chosen = tab === name;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
    $(`panel-${tab}`).hidden = !chosen;
    if (chosen && focus) button.focus();
  }
  cluster.show(name === "cluster");
}

function fromAddress() {
  const name = location.hash.slice(1);
  return TABS.includes(name) ? name : TABS[0];
}

function startTabs() {
  for (const [index, tab] of TABS.entries()) {
    const go = (name, options) => {
      history.replaceState(null, "", `#${name}`);
      select(name, options);
    };
    $(`tab-${tab}`).addEventListener("click", () => go(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      go(TABS[(index + step + TABS.length) % TABS.length], { focus: true });
    });
  }
  addEventListener("hashchange", () => {
    if (TABS.includes(location.hash.slice(1))) select(fromAddress()); // #main belongs to the skip link
  });
  select(fromAddress());
}

function showKey() {
  $("key-button").hidden = currentKey() === null;
}

const cluster = startCluster($("panel-cluster"));
startTabs();
startPlayground();
showKey();
onKeyChange(showKey);
$("key-button").addEventListener("click", () => askForKey());
